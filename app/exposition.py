"""What the service has counted, in Prometheus's format. The counting itself is in `app.statistics`.

The numbers become metrics only when somebody asks for them, so that a request pays for an addition and no more.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from app.checkpoint import Checkpoint
from app.statistics import Counts, Histogram


class CountsCollector(Collector):
    """What the service has counted, and what its processes use of the machine."""

    def __init__(self, counts: Counts, weights: Checkpoint) -> None:
        self._counts = counts
        self._weights = weights

    def collect(self) -> Iterator[Metric]:
        yield from self._http()
        yield from self._batches()
        yield from self._predictions()
        yield from self._state()
        yield from _process_metrics(self._counts.pids)

    def _http(self) -> Iterator[Metric]:
        traffic = self._counts.traffic
        by_route: defaultdict[tuple[str, ...], Histogram] = defaultdict(Histogram)
        for (route, _, _), seconds in traffic.seconds.items():
            by_route[route,].merge(seconds)
        yield _counter(
            "cifar_requests",
            "HTTP requests by route template, method and status; 499: the client left before its answer.",
            ("route", "method", "status"),
            {
                (route, method, str(status)): histogram.count
                for (route, method, status), histogram in traffic.seconds.items()
            },
        )
        yield _histogram(
            "cifar_request_seconds",
            "From when a request is let in to the end of its answer.",
            by_route,
            ("route",),
        )
        yield _counter(
            "cifar_refusals",
            "Requests answered with an error, by reason.",
            ("reason",),
            {(reason,): count for reason, count in traffic.refusals.items()},
        )
        yield CounterMetricFamily(
            "cifar_access_lines_dropped",
            "Lines of the access log that were dropped because nobody read them.",
            self._counts.lines_dropped,
        )

    def _batches(self) -> Iterator[Metric]:
        known = self._counts.statistics
        yield _histogram(
            "cifar_decode_seconds", "Decoding of a picture; raw pixels take next to nothing.", {(): known.prepare}
        )
        yield _histogram(
            "cifar_queue_seconds",
            "A picture's wait for its batch, including the decoding of others in it.",
            {(): known.queue},
        )
        yield _histogram("cifar_inference_seconds", "The whole forward pass a picture was part of.", {(): known.run})
        yield _histogram("cifar_batch_size", "Pictures that ran together.", {(): known.batches})

    def _predictions(self) -> Iterator[Metric]:
        known = self._counts.predictions
        yield _counter(
            "cifar_predictions",
            "Pictures by most probable class.",
            ("class",),
            {(name,): known.classes[name] for name in self._weights.classes},
        )
        yield _histogram("cifar_confidence", "Probability of that class.", {(): known.confidence})

    def _state(self) -> Iterator[Metric]:
        counts, weights = self._counts, self._weights
        yield GaugeMetricFamily("cifar_processes", "Processes that serve.", len(counts.pids))
        yield GaugeMetricFamily("cifar_queue_depth", "Pictures admitted and not yet answered.", counts.waiting)
        yield GaugeMetricFamily("cifar_ready", "1 if new requests should be sent here, as /readyz.", counts.ready)
        yield InfoMetricFamily(
            "cifar_weights",
            "The weights being served.",
            {"name": weights.architecture, "sha256": weights.sha256[:12]},
        )


def _process_metrics(pids: Sequence[int]) -> Iterator[Metric]:
    """The library's own process metrics, where the system offers them, combined over several processes."""
    for same in zip(*(ProcessCollector(registry=None, pid=partial(int, pid)).collect() for pid in pids), strict=False):
        metric = Metric(same[0].name, same[0].documentation, same[0].type)
        for samples in zip(*(each.samples for each in same), strict=True):
            values = [sample.value for sample in samples]
            first = metric.name == "process_start_time_seconds"
            metric.add_sample(samples[0].name, {}, min(values) if first else sum(values))
        yield metric


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
