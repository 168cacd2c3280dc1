"""One transfer by the runner's own functions, as a process of its own: start-up and log-in are in ssh_transfer.py's times."""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import execute_remote_command as runner                # noqa: E402


class Record:
    have = {}

    def note_arrived(self, entry, offset, size, sum256=""):
        pass


def main(way, base, config, folder, ident, streams):
    runner.SAY["log"] = open(os.devnull, "w")
    settings = runner.settings_of_options({"base": base, "ssh_options": "-F " + config, "streams": streams})._replace(connects=0)
    early = []
    line = runner.Line("hpc", settings).open(ident, lambda: early.append(runner.gather_inputs(
        [[os.path.join(folder, name), name] for name in sorted(os.listdir(folder))])))
    if way == "put":
        runner.put_inputs(line, Record(), early[0])
    elif way == "start":
        line.session.ask("start", command="true", batch=None).answer("state")          # results are only of what has run
    else:
        found = line.list_results(True)
        target = runner.Target(folder, ident)
        arrivals = runner.Arrivals(target)
        target.sync = len(found.files) <= 50           # as Runner.fetch_into() has it
        for name, mtime in found.folders:
            target.make_directory(name, mtime)
        wanted = [runner.with_part(entry, target) for entry in found.files if entry.far != runner.LOG]
        assert runner.get_results(line, Record(), wanted, arrivals)[1] == {}
        target.sync_all()
        target.close(True)
        assert not arrivals.kept, arrivals.kept
    line.close()


main(*sys.argv[1:])
os._exit(0)                                            # as the runner does
