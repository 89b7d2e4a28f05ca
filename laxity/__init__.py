"""Laxity's client: requests to pipelines of DNN models that are answered inside a latency objective.

Use it so::

    import laxity

    with laxity.Client("tcp://127.0.0.1:7100") as client:
        print(client.infer("ocr", open("picture.png", "rb").read()))
"""

from laxity.aio import AsyncClient, AsyncReplyFuture
from laxity.client import Client, ReplyFuture
from laxity.node import PayloadError
from laxity.outcomes import (
    Cancelled,
    Dropped,
    Expired,
    Failed,
    LaxityError,
    Outcome,
    Rejected,
    Unavailable,
)
from laxity.reply import Reply, Timing
from laxity.routes import ServedPipeline
from laxity.version import __version__

__all__ = [
    "AsyncClient",
    "AsyncReplyFuture",
    "Cancelled",
    "Client",
    "Dropped",
    "Expired",
    "Failed",
    "LaxityError",
    "Outcome",
    "PayloadError",
    "Rejected",
    "Reply",
    "ReplyFuture",
    "ServedPipeline",
    "Timing",
    "Unavailable",
    "__version__",
]
