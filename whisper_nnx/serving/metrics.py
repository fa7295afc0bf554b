"""What a server counts, for Prometheus: `/metrics`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from whisper_nnx.output.results import Segment
from whisper_nnx.serving.scheduler import Scheduler

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_FACTORS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """Counters and histograms of a server, in a registry of their own."""

    def __init__(self, scheduler: Scheduler):
        self.registry = registry = CollectorRegistry()
        registry.register(_OfScheduler(scheduler))
        registry.register(_compilations)
        _compilations.listen()
        self.requests = Counter(
            "whisper_requests", "requests by route and status", ["route", "status"], registry=registry
        )
        self.latency_s = Histogram(
            "whisper_request_seconds", "from a request to the end of its response", ["route"], buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.first_text_s = Histogram(
            "whisper_first_text_seconds", "from the end of an upload to the first text", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.uploaded_bytes = Counter("whisper_uploaded_bytes", "bytes of all forms", registry=registry)
        self.audio_in_s = Counter("whisper_audio_in_seconds", "audio of opened recordings", registry=registry)
        self.audio_out_s = Counter("whisper_audio_out_seconds", "audio of finished recordings", registry=registry)
        self.real_time_factor = Histogram(
            "whisper_real_time_factor", "seconds of audio for each second from the end of its upload to its result",
            buckets=_FACTORS, registry=registry,
        )  # fmt: skip
        self.windows = Counter(
            "whisper_windows", "windows with text, by the temperature that it was decoded at", ["temperature"],
            registry=registry,
        )  # fmt: skip

    def count_windows(self, segments: list[Segment]) -> None:
        temperatures = {segment["seek"]: segment["temperature"] for segment in segments}
        for temperature in temperatures.values():
            self.windows.labels(f"{temperature:.1f}").inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _OfScheduler(Collector):
    """Read when asked for."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler

    def collect(self) -> Iterator[Any]:
        stats = self._scheduler.stats
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        yield gauge("whisper_requests_in_progress", "requests that were taken and are not done", stats.requests)
        yield gauge("whisper_rows_busy", "windows that are decoded together at present", stats.rows)
        yield gauge("whisper_models_loaded", "models in memory", len(stats.models))
        yield gauge("whisper_ready", "whether requests are taken", int(self._scheduler.accepting))
        yield counter("whisper_steps", "steps of the batches", stats.steps)
        yield counter("whisper_encoder_cache_hits", "windows that were not encoded again", stats.cache_hits)
        retries = counter("whisper_retries", "windows that were tried again, by threshold", labels=["threshold"])
        for threshold in ("compression_ratio", "logprob"):
            retries.add_metric([threshold], stats.retries[threshold])
        yield retries


class _Compilations(Collector):
    """Counts the programs that XLA compiles in this process, once `listen` was called."""

    def __init__(self) -> None:
        self._count = 0
        self._lock = threading.Lock()
        self._listening = False

    def listen(self) -> None:
        import jax

        with self._lock:
            if not self._listening:
                jax.monitoring.register_event_duration_secs_listener(self._add)
                self._listening = True

    def _add(self, event: str, *_: Any, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            with self._lock:
                self._count += 1

    def collect(self) -> Iterator[Any]:
        yield CounterMetricFamily("whisper_compilations", "programs that XLA compiled", self._count)


_compilations = _Compilations()
