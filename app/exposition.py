"""What the service has counted, as Prometheus reads it. The counting itself is in `app.statistics`.

The numbers are turned into metrics when somebody asks for them, so that a request pays for an addition and no more.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from app.logs import AccessLog
from app.service import Service
from app.statistics import Histogram, Traffic


class ServiceCollector(Collector):
    """Reads everything from where it is counted, at the moment of the question."""

    def __init__(self, service: Service, traffic: Traffic, access_log: AccessLog | None) -> None:
        self._service = service
        self._traffic = traffic
        self._access_log = access_log

    def collect(self) -> Iterator[Metric]:
        yield from self._http()
        yield from self._batches()
        yield from self._predictions()
        yield from self._state()

    def _http(self) -> Iterator[Metric]:
        by_route: defaultdict[tuple[str, ...], Histogram] = defaultdict(Histogram)
        for (route, _, _), seconds in self._traffic.seconds.items():
            by_route[route,].merge(seconds)
        yield _counter(
            "cifar_requests",
            "HTTP requests by route template, method and status; 499 is a client that left before its answer.",
            ("route", "method", "status"),
            {(route, method, str(status)): of.count for (route, method, status), of in self._traffic.seconds.items()},
        )
        yield _histogram(
            "cifar_request_seconds",
            "From the head of a request to the end of its answer.",
            by_route,
            ("route",),
        )
        yield _counter(
            "cifar_refusals",
            "Requests answered with an error, by its reason.",
            ("reason",),
            {(reason,): count for reason, count in self._traffic.refusals.items()},
        )

        if self._access_log is not None:
            help = "Lines of the access log that were dropped because nobody read them."
            yield CounterMetricFamily("cifar_access_lines_dropped", help, self._access_log.dropped)

    def _batches(self) -> Iterator[Metric]:
        known = self._service.statistics
        yield _histogram(
            "cifar_decode_seconds", "Decoding a picture; raw pixels take next to nothing.", {(): known.prepare}
        )
        yield _histogram(
            "cifar_queue_seconds",
            "A picture's wait for its batch, also while others of it are decoded.",
            {(): known.queue},
        )
        yield _histogram("cifar_inference_seconds", "The forward pass that a picture was in, whole.", {(): known.run})
        yield _histogram("cifar_batch_size", "Pictures that ran together.", {(): known.batches})

    def _predictions(self) -> Iterator[Metric]:
        known = self._service.predictions
        yield _counter(
            "cifar_predictions",
            "Pictures by the class that was the most probable one.",
            ("class",),
            {(name,): known.classes[name] for name in self._service.checkpoint.classes},
        )
        yield _histogram("cifar_confidence", "Probability of that class.", {(): known.confidence})

    def _state(self) -> Iterator[Metric]:
        service = self._service
        yield GaugeMetricFamily("cifar_queue_depth", "Pictures admitted and not yet answered.", service.waiting)
        yield GaugeMetricFamily("cifar_ready", "1 if new requests should be sent here, as /readyz.", service.ready)
        checkpoint = service.checkpoint
        yield InfoMetricFamily(
            "cifar_weights",
            "The weights that are served.",
            {"name": checkpoint.architecture, "sha256": checkpoint.sha256[:12]},
        )


def registry(service: Service, traffic: Traffic, access_log: AccessLog | None) -> CollectorRegistry:
    """One of its own for each application: the library's is one for the whole process."""
    own = CollectorRegistry()
    own.register(ServiceCollector(service, traffic, access_log))
    ProcessCollector(registry=own)  # memory, processor time and open files, where the system tells
    return own


def _counter(name: str, help: str, labels: tuple[str, ...], counts: Mapping[tuple[str, ...], int]) -> Metric:
    family = CounterMetricFamily(name, help, labels=labels)
    for values, count in counts.items():
        family.add_metric(values, count)
    return family


def _histogram(
    name: str, help: str, histograms: Mapping[tuple[str, ...], Histogram], labels: tuple[str, ...] = ()
) -> Metric:
    family = HistogramMetricFamily(name, help, labels=labels)
    for values, histogram in histograms.items():
        bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
        family.add_metric(values, list(zip(bounds, accumulate(histogram.counts), strict=True)), histogram.sum)
    return family
