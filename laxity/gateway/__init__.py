"""A gateway: the Open Inference Protocol, version 2, in front of :class:`laxity.AsyncClient`.

Clients made for Triton or KServe can be pointed at it. An optional process (``laxity gateway run``), which `import
laxity` does not import: it needs starlette and uvicorn, and for gRPC ``pip install 'laxity[gateway]'``.
"""
