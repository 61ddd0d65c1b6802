"""What a plan cannot be made of."""


class PlanError(Exception):
    """A program that cannot be built; `kind` is memory, sharding, kernel or compiler, the message is one line."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind
