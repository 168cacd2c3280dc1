"""Commands whose children hide in all the ways that are known, and how long a cancel takes until the last of them is gone.

Every process of a family holds a FIFO open: who reads it sees a hang-up at the moment when the last one has ended."""
import os
import select
import time

from suite import wait_until

KINDS = {
    "plain": "sleep 300 &",
    "session": "setsid sleep 300 &",
    "daemon": "setsid sh -c 'sleep 300 & sleep 300 &'",                      # their parent has ended before the cancel
    "bare": "env -i sleep 300 &",
    "orphan": "env -i setsid sh -c 'cd /; sleep 300 & sleep 300 &'",       # nothing of the command is left in it: no parent, session, environment, directory
    "deaf": "env -i setsid sh -c 'trap \"\" TERM; while :; do sleep 0.1; done' &",
    "forks": "env -i setsid sh -c 'while :; do setsid sleep 5 & sleep 0.02; done' &",
    "chain": "env -i setsid \"$0\" -chain &",          # each lives for some ms, ignores SIGTERM, and leaves one child behind
    "stopped": "env -i setsid sh -c 'kill -STOP $$' &",
}
BODY = r"""#!/bin/sh
[ "$1" = -chain ] && { trap '' TERM; sleep 0.005; setsid "$0" -chain & exit; }
mkfifo "%s/$MI_RUN" && exec 9<>"%s/$MI_RUN"
case $1 in %s
all) %s;;
esac
sleep 0.2                                              # parents end, chains run
mv "%s/$MI_RUN" "%s/$MI_RUN.ready"
%s
"""


class Family:
    """The command folder/family KIND; end: what it does itself when its children are there."""

    def __init__(self, folder, end="sleep 300"):
        self.folder, self.command = folder, os.path.join(folder, "family")
        os.makedirs(folder, exist_ok=True)
        with open(self.command, "w") as out:
            out.write(BODY % (folder, folder, "".join("\n%s) %s;;" % item for item in KINDS.items()), "\n    ".join(KINDS.values()), folder, folder, end))
        os.chmod(self.command, 0o755)

    def alive(self, run, seconds=20):
        """A descriptor that hangs up when the family of that run (ACCEPT_ID.N) is gone; waits until all of it is there."""
        path = os.path.join(self.folder, run + ".ready")
        wait_until(lambda: os.path.exists(path), seconds, path)
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK)


def gone(alive, seconds):
    """The moment (monotonic) at which each of the descriptors {name: fd} has hung up; those that have not after so many seconds are missing."""
    found, until = {}, time.monotonic() + seconds
    while len(found) < len(alive) and time.monotonic() < until:
        waiting = select.poll()
        for name in set(alive) - set(found):
            waiting.register(alive[name], 0)
        hung = {fd for fd, event in waiting.poll(1000 * max(0.0, until - time.monotonic()))}
        found.update((name, time.monotonic()) for name in alive if alive[name] in hung and name not in found)
    for fd in alive.values():
        os.close(fd)
    return found
