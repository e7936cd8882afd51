"""The end of a demo: DIR/report.json, DIR/report.md, and the one object that `--json` prints.

Progress + phases + what the export said ─▶ Report ─▶ report.json ─▶ loss.png (hypha.demo.plot)
                                                   └▶ report.md, Summary
"""

from pathlib import Path

import msgspec
from msgspec import Struct

from hypha.demo.progress import Progress, Round

JSON_NAME, MARKDOWN_NAME, PLOT_NAME = "report.json", "report.md", "loss.png"
# A line of a terminal or of a page.
SAMPLE_CHARS_SHOWN = 100
FENCE = "```"


class Summary(Struct, frozen=True, kw_only=True):
    """What `--json` prints; `error` says why the run ended early, else null. Losses are in nats per byte."""

    initial_loss: float | None
    final_loss: float | None
    rounds: int
    workers: int
    samples: int
    wall_s: float
    bytes_sent: int
    bytes_received: int
    model_dir: str | None
    error_lines: int
    report: str
    error: str | None = None


class Report(Struct, frozen=True, kw_only=True):
    """Everything that is worth keeping of a run; times in seconds, losses in nats per byte."""

    text: str
    workers: int
    rounds: int
    samples: int
    wall_s: float
    phases: dict[str, float]
    initial_loss: float | None
    final_loss: float | None
    held_out: dict[int, float]
    training: list[Round]
    bytes_sent: int
    bytes_received: int
    error_lines: int
    errors: list[str]
    failure: str | None
    model_dir: str | None
    sample_before: str
    sample_after: str

    def summary(self, directory: Path) -> Summary:
        """Return the object for `--json`."""
        return Summary(
            initial_loss=self.initial_loss,
            final_loss=self.final_loss,
            rounds=self.rounds,
            workers=self.workers,
            samples=self.samples,
            wall_s=round(self.wall_s, 2),
            bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
            model_dir=self.model_dir,
            error_lines=self.error_lines,
            report=str(directory / MARKDOWN_NAME),
            error=self.failure,
        )


class Exported(Struct, frozen=True):
    """What `python -m hypha.training.export` prints."""

    model_dir: str
    parameters: int
    sample_before: str = ""
    sample_after: str = ""


def report_of(
    progress: Progress,
    *,
    text: str,
    workers: int,
    wall_s: float,
    phases: dict[str, float],
    exported: Exported | None,
    failure: str | None,
) -> Report:
    """Add everything up. `phases` are those measured from outside; the rounds' own are taken from the scheduler."""
    inside = {name: sum(getattr(each, f"{key}_s") for each in progress.rounds) for name, key in _INSIDE.items()}
    return Report(
        text=text,
        workers=workers,
        rounds=progress.last_round,
        samples=progress.samples,
        wall_s=wall_s,
        phases={name: round(seconds, 2) for name, seconds in {**phases, **inside}.items()},
        initial_loss=progress.held_out.get(0),
        final_loss=progress.latest_loss() if progress.rounds else None,
        held_out=dict(sorted(progress.held_out.items())),
        training=progress.rounds,
        bytes_sent=progress.bytes_sent,
        bytes_received=progress.bytes_received,
        error_lines=progress.errors,
        errors=progress.errors_shown,
        failure=failure,
        model_dir=None if exported is None else exported.model_dir,
        sample_before="" if exported is None else exported.sample_before,
        sample_after="" if exported is None else exported.sample_after,
    )


_INSIDE = {"training": "train", "merging": "merge", "committing": "commit"}


def write(report: Report, directory: Path) -> None:
    """Write report.json and report.md."""
    (directory / JSON_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    (directory / MARKDOWN_NAME).write_text(markdown(report))


def lines(report: Report) -> list[str]:
    """Return the report as a person reads it in a terminal."""
    said = [] if report.failure is None else [f"It failed: {report.failure}"]
    said += [
        f"{_loss(report.initial_loss)} → {_loss(report.final_loss)} nats per byte on text that was never trained on",
        f"{report.rounds} rounds, {report.samples} samples, {report.workers} workers, {report.wall_s:.1f} s",
        f"{_megabytes(report.bytes_sent)} sent, {_megabytes(report.bytes_received)} received, by all nodes together",
        "time: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.phases.items()),
        f"errors: {report.error_lines}",
    ]
    said += [f"  {each}" for each in report.errors]
    if report.model_dir is not None:
        said += [f"before: {one_line(report.sample_before)}", f"after:  {one_line(report.sample_after)}"]
        said.append(f"model:  {report.model_dir}")
    return said


def markdown(report: Report) -> str:
    """Return report.md."""
    outcome = "The job finished." if report.failure is None else f"**It failed:** {report.failure}"
    rows = "".join(f"| {name} | {seconds:.1f} |\n" for name, seconds in report.phases.items())
    rounds = "".join(
        f"| {each.number} | {each.loss:.3f} | {_loss(report.held_out.get(each.number))} | {each.samples} "
        f"| {each.contributors} | {each.samples_per_s:.0f} |\n"
        for each in report.training
    )
    errors = "".join(f"* {each}\n" for each in report.errors) or "None.\n"
    return _MARKDOWN.format(
        outcome=outcome,
        text=report.text,
        initial=_loss(report.initial_loss),
        final=_loss(report.final_loss),
        rounds=report.rounds,
        samples=report.samples,
        workers=report.workers,
        wall=f"{report.wall_s:.1f}",
        sent=_megabytes(report.bytes_sent),
        received=_megabytes(report.bytes_received),
        plot=PLOT_NAME,
        round_rows=rounds,
        phase_rows=rows,
        before=_fenced(report.sample_before),
        after=_fenced(report.sample_after),
        model=report.model_dir or "(none)",
        count=report.error_lines,
        errors=errors,
    )


def one_line(text: str) -> str:
    """Return the beginning of a text as one printable line."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(shown.split())[:SAMPLE_CHARS_SHOWN]


def _fenced(text: str) -> str:
    """Return a text that cannot end the fence around it."""
    return text.strip().replace(FENCE, FENCE[:2]) or "(none)"


def _loss(loss: float | None) -> str:
    return "?" if loss is None else f"{loss:.3f}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


_MARKDOWN = """\
# Report of the demo

{outcome}

Held-out loss went from {initial} to {final} nats per byte in {rounds} outer rounds over {samples} samples of {text},
with {workers} workers in {wall} s. All nodes together sent {sent} and received {received}.

![losses]({plot})

| round | training loss | held-out loss | samples | contributors | samples/s |
|---|---|---|---|---|---|
{round_rows}
| phase | seconds |
|---|---|
{phase_rows}
The dataset is prepared while certificates are made and nodes start; evaluation runs beside training.

Text sampled from the model before training:

```text
{before}
```

and after:

```text
{after}
```

`AutoModelForCausalLM.from_pretrained` loads the model from `{model}`.

## Errors: {count}

{errors}"""
