"""What a shard raises when it cannot begin."""


class AddressInUse(OSError):
    """The port asked for is taken; the text names it and says what to do."""
