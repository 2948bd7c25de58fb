"""What the service counts, in Prometheus' text format. A registry of its own for each service, not the process's."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from weightnet.serve.connections import Connections
from weightnet.serve.service import Service

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_PHOTOS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counts a service's requests and batches; what is true of the moment is looked up when it is asked for."""

    def __init__(self, service: Service, connections: Connections) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "weightnet_requests", "Requests that were answered", ["path", "status"], registry=self._registry
        )
        self._latency = Histogram(
            "weightnet_request_seconds",
            "From a request's head to the end of its answer",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._batches = Histogram(
            "weightnet_batch_photos", "Photos in a batch", buckets=_PHOTOS, registry=self._registry
        )
        service.on_batch = self._batches.observe
        for name, text, value in (
            ("requests_in_work", "Photos in work", lambda: service.admission.requests),
            ("buffered_bytes", "Size of the bodies in work", lambda: service.admission.buffered_bytes),
            ("queued_photos", "Photos that wait for the network", lambda: _queued(service)),
            ("connections", "Open connections", lambda: connections.open),
            ("connections_refused", "Connections refused so far, by their number", lambda: connections.refused),
            ("connections_cut_off", "Connections cut off so far, by a deadline", lambda: connections.cut_off),
        ):
            Gauge(f"weightnet_{name}", text, registry=self._registry).set_function(value)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count an answered request; status 499 stands for a client that went away."""
        self._requests.labels(path, str(status)).inc()
        self._latency.labels(path).observe(seconds)

    def text(self) -> bytes:
        """Return all in Prometheus' text format."""
        return generate_latest(self._registry)


def _queued(service: Service) -> int:
    return sum(model.batcher.queued for model in service.models.values())
