"""What a command says while it works: above the progress bar, and in log.txt."""

import sys
import time
from pathlib import Path

from samlora.errors import InputError


class Journal:
    """Lines for people, printed and appended to `folder`/log.txt with the time.

    Makes the folder. Raises InputError naming `flag` where it cannot be written.
    """

    def __init__(self, folder: Path, flag: str):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / "log.txt", "a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{flag}: cannot write {folder} ({error.strerror}); choose another folder") from None

    def say(self, line: str) -> None:
        from tqdm import tqdm

        tqdm.write(line, file=sys.stdout)
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
