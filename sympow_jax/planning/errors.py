"""What a plan cannot be made of."""


class PlanError(Exception):
    """What cannot be built; `kind` is memory, sharding, kernel, compiler or config. The message is one line."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind
