"""The sessions of all open pages: found by an id that only the page knows, the longest unused closed first."""

import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass

from samlora.app.library import Upload
from samlora.app.models import Models
from samlora.app.session import Session
from samlora.errors import InputError

MOST_SESSIONS = 32


class LostSessionError(InputError):
    """A page's session is not there any more."""


class StalePageError(InputError):
    """A page speaks of an image that is not the session's any more."""


@dataclass
class Tab:
    """What belongs to one page: its session, the files its image came from, and those that are coming."""

    session: Session
    upload: Upload | None = None
    coming: Upload | None = None

    def begin(self, upload: Upload | None) -> None:
        """Files are coming; what came before and was not opened goes."""
        if self.coming is not None:
            self.coming.close()
        self.coming = upload

    def settle(self) -> None:
        """The image is of the files that came, if any did; those of the image before go."""
        if self.upload is not None:
            self.upload.close()
        self.upload, self.coming = self.coming, None

    def close(self) -> None:
        """Ends what is running and removes all files."""
        if self.session.job is not None:
            self.session.job.cancel()
        self.begin(None)
        self.settle()


class Sessions:
    """At most `most` sessions on the same models."""

    def __init__(self, models: Models, most: int = MOST_SESSIONS):
        self._models, self._most = models, most
        self._tabs: OrderedDict[str, Tab] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tabs)

    def new(self) -> str:
        """Makes a session and returns its id; the longest unused one ends where there are too many."""
        made, name = Tab(Session(self._models)), secrets.token_urlsafe(16)
        with self._lock:
            self._tabs[name] = made
            ended = [self._tabs.popitem(last=False)[1] for _ in range(len(self._tabs) - self._most)]
        for tab in ended:
            tab.close()
        return name

    def get(self, name: str) -> Tab:
        """The session of that id. Raises LostSessionError if there is none."""
        with self._lock:
            if name not in self._tabs:
                raise LostSessionError("this page's session has ended; reload the page to begin anew")
            self._tabs.move_to_end(name)
            return self._tabs[name]

    def close(self) -> None:
        """Ends all sessions and removes the files that were handed in."""
        with self._lock:
            tabs = list(self._tabs.values())
            self._tabs.clear()
        for tab in tabs:
            tab.close()
