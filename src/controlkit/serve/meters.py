"""Meters of a server, as Prometheus reads them."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from controlkit.sample.jobs import BATCH


class Meters:
    """Counts and times of one server; each has its own registry."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.accepted = Counter("controlkit_jobs_accepted", "Jobs accepted", ("api", "kind"), registry=own)
        self.ended = Counter("controlkit_jobs_ended", "Jobs ended", ("api", "state"), registry=own)
        self.refused = Counter("controlkit_requests_refused", "Requests refused", ("reason",), registry=own)
        self.deaths = Counter("controlkit_worker_deaths", "Workers that died", registry=own)
        self.seconds = Histogram(
            "controlkit_job_seconds",
            "From a job's acceptance to its end",
            ("kind",),
            registry=own,
            buckets=(0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 900),
        )
        self.batch = Histogram(
            "controlkit_batch_pictures", "Pictures made together", registry=own, buckets=(1, 2, 4, 8, BATCH)
        )

    def text(self, counts: dict[str, int]) -> bytes:
        """All of it in Prometheus's text format; ``counts``: jobs in the queue by state."""
        states = "".join(
            f'controlkit_jobs{{state="{state}"}} {counts.get(state, 0)}\n' for state in ("waiting", "running")
        )
        head = "# HELP controlkit_jobs Jobs that wait or are at work\n# TYPE controlkit_jobs gauge\n"
        return generate_latest(self.registry) + f"{head}{states}".encode()
