"""The relay's calls as an OpenAPI description, made of its ROUTES and FIELDS; documents.py writes it to openapi.json."""
import suite

TEXT, NUMBER, YES, ANY = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {}
OBJECT = {"type": "object"}
KINDS = {str: TEXT, int: NUMBER, bool: YES, dict: OBJECT, None: ANY}
ENTRY = {"type": "object", "properties": {"size": {"type": "integer", "minimum": 0}, "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
                                           "x": YES, "mtime": {"type": "number"}, "data": TEXT}}
FILES = {"type": "object", "additionalProperties": ENTRY}
INFO = {"type": "object", "required": ["command", "remote-site"], "properties": {
    "command": {"enum": ["hello", "other"]}, "remote-site": {"enum": [suite.SITE, "u-other", ""]}, "parameters": TEXT, "parameter_files": FILES,
    "result_files": OBJECT, "result_patterns": {"type": "array", "items": TEXT}}}
# fields whose kind alone does not say what is in them, or of which a test makes only some
SHAPES = {"site_id": {"enum": [suite.SITE, "u-other", ""]}, "wait": {"type": "integer", "maximum": 0}, "have": {"type": "object", "additionalProperties": TEXT},
          "calc-info": INFO, "result": {"enum": ["calc end", "abnormal", "end send", ""]}, "result_files": FILES, "files": FILES,
          "missing": {"type": "object", "additionalProperties": TEXT}, "refused": {"type": "object", "additionalProperties": TEXT},
          "calcs": {"type": "object", "additionalProperties": {"type": "object", "properties": {
              "claim": TEXT, "phase": TEXT, "what": TEXT, "out": {"type": "array"}, "err": {"type": "array"}}}},
          "stream": {"enum": ["out", "err", ""]},
          "presence": {"type": "object", "properties": {"state": TEXT, "until": NUMBER, "jobs": NUMBER, "busy": NUMBER, "outbox": NUMBER, "oldest": NUMBER,
                                                        "free": NUMBER, "version": TEXT}},
          "verdicts": {"type": "object", "additionalProperties": {"type": "object", "properties": {
              "count": NUMBER, "names": {"type": "array", "items": TEXT}}}}}
PLACES = {"{id}": {"type": "string", "pattern": "^[0-9a-f-]{36}$"}, "{kind}": {"enum": ["input", "result"]},
          "{n}": {"type": "integer", "minimum": 0, "maximum": 99}}                 # of a path
ANSWER = {"description": "the envelope", "content": {"application/json": {"schema": {"anyOf": [
    {"type": "object", "required": ["errors"], "properties": {"errors": {"type": "array", "minItems": 1, "items": {
        "type": "object", "required": ["code"], "properties": {"code": {"type": ["integer", "string"]}, "message": TEXT}}}}},
    {"type": "object", "properties": {"errors": False}}]}}}}


def operation(method, route, places=(), schemas=None):
    """One call. Where it may bring bytes of files, its fields stand in the query."""
    given = [{"name": place.strip("{}"), "in": "path", "required": True, "schema": PLACES[place]} for place in places]
    if method == "POST" and not (route.bulk and "files" not in route.fields):
        body = {"type": "object", "properties": dict({"v": {"enum": [2, 1]}}, **{name: schemas[name] for name in route.fields})}
        made = {"requestBody": {"content": {"application/json": {"schema": body}}}, "responses": {"default": ANSWER}}
        return dict(made, parameters=given) if given else made
    given += [{"name": name, "in": "query", "schema": schemas[name]} for name in ("v",) + route.fields]
    made = {"parameters": given, "responses": {"default": ANSWER}}
    if method == "POST":
        made["requestBody"] = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
    return made


def description():
    """The whole of it."""
    relay, paths = suite.module("mi_dicomapi.py"), {}
    schemas = dict({name: SHAPES.get(name, KINDS[field.kind]) for name, field in relay.FIELDS.items()}, v=NUMBER)
    for (method, name), route in sorted(relay.ROUTES.items()):
        path = name.replace("ID", "{id}").replace("KIND", "{kind}").replace("/N", "/{n}")
        paths.setdefault(relay.API_PATH + path, {})[method.lower()] = operation(method, route, [place for place in PLACES if place in path], schemas)
    paths[relay.API_PATH + "version"] = {"get": operation("GET", relay.route(None, None), (), schemas)}
    return {"openapi": "3.1.0", "info": {"title": "mi-distcomp-api", "version": "2"}, "paths": paths}
