# SPDX-License-Identifier: Apache-2.0
"""Errors that users can fix, collected for one message, and how a message is printed."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A mistake that the user can fix. The message names the value, the limit and the way out."""


class TrainingStopped(RuntimeError):
    """Training can't continue. If this is shared, all processes stop with it and only the first one prints it."""

    def __init__(self, message: str, is_shared: bool = False) -> None:
        super().__init__(message)
        self.is_shared = is_shared


class TrainingInterrupted(KeyboardInterrupt):
    """The user stopped training with a signal of this number."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


class Problems:
    """Collects mistakes for one message, each once."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        if message not in self.messages:
            self.messages.append(message)

    @contextmanager
    def collected(self, prefix: str = "") -> Iterator[None]:
        """Adds a ValueError, such as an InputError, as a mistake."""
        try:
            yield
        except ValueError as error:
            self.add(f"{prefix}{error}")

    def as_error(self) -> InputError:
        if len(self.messages) == 1:
            return InputError(self.messages[0])
        lines = [f"  {number}. {message}" for number, message in enumerate(self.messages, start=1)]
        return InputError("\n".join([f"{len(lines)} problems:", *lines]))


def on_screen(text: str) -> str:
    """A name or a label on one line, without control characters, which a terminal would obey."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def without_worker_traceback(error: Exception) -> str:
    """The message without the traceback of a worker process that torch puts before it."""
    message = str(error).strip()
    return message.rsplit(f"{type(error).__name__}: ", 1)[-1] if "Original Traceback" in message else message
