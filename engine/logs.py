"""Records of training: a file with one JSON object a line, and the progress that a person sees."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError within says that `path` cannot be written, and why."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written ({error.strerror})") from error


class JsonLines:
    """Appends records to a file; each is on disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict) -> None:
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict]:
        """The records, up to the first line that a kill left unfinished; [] if there is no file."""
        records = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    break
                if not isinstance(record, dict):
                    break
                records.append(record)
        return records


class Progress:
    """A bar on a terminal; without one, a plain line at most every `interval` seconds and at the end."""

    def __init__(self, epochs: int, steps: int, start: int = 0, enabled: bool = True, interval: float = 10.0) -> None:
        self.epochs, self.interval, self.last_line = epochs, interval, time.monotonic()
        bar = enabled and sys.stderr.isatty()
        self.lines = enabled and not bar
        self.bar = tqdm(total=epochs * steps, initial=start * steps, disable=not bar, unit="step", dynamic_ncols=True)

    def step(self) -> None:
        self.bar.update()

    def epoch(self, record: dict) -> None:
        values = " ".join(f"{k} {v:.4g}" for k, v in record.items() if isinstance(v, float))
        self.bar.set_description(f"epoch {record['epoch']}/{self.epochs}", refresh=False)
        self.bar.set_postfix_str(values)
        if self.lines and (time.monotonic() - self.last_line > self.interval or record["epoch"] == self.epochs):
            print(f"epoch {record['epoch']}/{self.epochs} {values}", file=sys.stderr, flush=True)
            self.last_line = time.monotonic()

    def note(self, text: str) -> None:
        """A line of its own, if anything is shown at all."""
        if self.lines or not self.bar.disable:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()
