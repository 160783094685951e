"""A trial that takes no time to start: leaves what `largebatch train` leaves, and notes each of its
beginnings and ends in the sweep's `notes`.

Its words: `+lasts=N` is how long it works, in hundredths of a second; `+does=…` how it ends;
`+waits=true` keeps it from ending before the sweep has a file `go-TRIAL`. It resumes where SIGTERM,
or worse, stopped it.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

words = dict(word.lstrip("+").split("=", 1) for word in sys.argv[1:] if "=" in word)
sweep = Path(words["hydra.sweep.dir"].strip("'"))
folder = sweep / words["hydra.sweep.subdir"].strip("'")
done = folder / "hundredths"


def note(what: str) -> None:
    with (sweep / "notes").open("a") as file:
        host = os.environ.get("FAKE_HOST", "here").partition(".")[0]
        file.write(f"{what} {folder.name} {host} {int(done.read_text() or 0)}\n")


def end(status: str, code: int) -> None:
    (folder / "summary.json").write_text(json.dumps({"status": status}))
    note(status)
    sys.exit(code)


def stopped(number: int, frame: object) -> None:
    end("interrupted", 128 + number)


signal.signal(signal.SIGTERM, stopped)
signal.signal(signal.SIGUSR2, stopped)
if "FAKE_NODES" in os.environ and "FAKE_HOST" in os.environ:  # so that its node can take it along
    pid = f"{folder.name}.{os.environ['FAKE_HOST']}.pid"
    Path(os.environ["FAKE_NODES"], pid).write_text(str(os.getpid()))
done.touch()
note("begun")
(folder / "summary.json").unlink(missing_ok=True)
behaviour = words.get("does", "ends")
if behaviour == "is-refused":
    print("largebatch: the trial does not like its words")
    sys.exit(2)
if behaviour == "crashes":
    end("failed", 1)
for hundredths in range(int(done.read_text() or 0), int(words.get("lasts", 10))):
    time.sleep(0.01)
    draft = done.with_suffix(".draft")
    draft.write_text(str(hundredths + 1))
    draft.replace(done)  # at once: a signal may come between any two lines
while "waits" in words and not (sweep / f"go-{folder.name}").exists():
    time.sleep(0.01)
end(*{"diverges": ("diverged", 4), "misses": ("exhausted", 3)}.get(behaviour, ("reached", 0)))
