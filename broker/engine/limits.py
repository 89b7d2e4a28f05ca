"""What a shard takes at most."""


class Limits:
    """Bounds of a shard: bytes of payloads held, bytes of one request's payload, requests in flight in all and of one
    client (of one owner, where clients have keys)."""

    def __init__(
        self,
        max_bytes: int = 4 * 1024**3,
        max_payload: int = 64 * 1024**2,
        max_requests: int = 200_000,
        max_client_requests: int = 1 << 60,
    ) -> None:
        self.max_bytes = max_bytes
        self.max_payload = max_payload
        self.max_requests = max_requests
        self.max_client_requests = max_client_requests
