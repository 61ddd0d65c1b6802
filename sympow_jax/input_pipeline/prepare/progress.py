"""How far a long job is, for whoever shows it."""


class Progress:
    """Told how far a job is; this one says nothing."""

    def start(self, what: str, total: int | None) -> None:
        """A stage begins."""

    def advance(self, amount: int) -> None:
        """Part of it is done."""
