"""What a suite leaves behind: results.parquet, report.md with plots beside it, and report.html with them inside.

results.parquet   one row a finished run
report.md         tables and plots
report.html       the same, in one file that needs no other
overview.png      where each method ended on each dataset
curves-NAME.png   of each dataset
"""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from html import escape
from pathlib import Path

from spryfl.compare.cells import Suite
from spryfl.compare.equal_score import equal_score_table
from spryfl.compare.plots import plot_dataset, plot_overview
from spryfl.compare.results import Result, ResultRow, read_results, write_parquet
from spryfl.compare.summary import summary_table
from spryfl.compare.tables import Table, metrics_table, note, overview_tables, results_table, search_table, target_table
from spryfl.config import SearchConfig, SuiteConfig
from spryfl.files import write_atomically
from spryfl.tracking.run_directory import RunDirectory

STYLE = (
    "body{font-family:sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;font-size:.9rem}"
    "th,td{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:right}"
    "th:first-child,td:first-child{text-align:left}img{max-width:100%}"
)
Block = str | Table | Path
SUMMARY = (
    "By how many points of the central test some methods end above each, and in what part of its client CPU seconds "
    "they are as good as it was at its best evaluation: medians over datasets, and from the least to the most."
)


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it: lines of text, tables, plots."""

    title: str
    blocks: Sequence[Block]


def write_results(suite: Suite) -> list[ResultRow]:
    """Everything but the plots and the page: quick, so that it is done after each run."""
    return _write_results(suite, read_results(suite))[0]


def write_report(suite: Suite) -> list[ResultRow]:
    """All of it, from the runs that are finished."""
    results = read_results(suite)
    labels = [method.shown for method in suite.config.method]
    contenders = [method.shown for method in suite.config.method if method.name in suite.config.contenders]
    for dataset, own in _by_dataset(results).items():
        plot_dataset(own, labels, _curves(suite, dataset), contenders)
    if results:
        plot_overview([result.row for result in results], labels, _overview(suite), contenders)
    rows, sections = _write_results(suite, results)
    write_atomically(suite.out / "report.html", _html(_title(suite), sections).encode())
    return rows


def _write_results(suite: Suite, results: Sequence[Result]) -> tuple[list[ResultRow], list[Section]]:
    rows = [result.row for result in results]
    write_parquet(rows, suite.out / "results.parquet")
    sections = report_sections(suite, results)
    write_atomically(suite.out / "report.md", _markdown(_title(suite), sections).encode())
    return rows, sections


def report_sections(suite: Suite, results: Sequence[Result]) -> list[Section]:
    """The report, apart from how it is written down."""
    rows = [result.row for result in results]
    shown = {method.name: method.shown for method in suite.config.method}
    reference = None if suite.config.reference is None else shown[suite.config.reference]
    contenders = [shown[name] for name in suite.config.contenders]
    sections = [Section("", [_told_of_runs(suite, rows), *_told_of_failures(suite), f"Made by: {suite.command}"])]
    glance: list[Block] = [_overview(suite)] if _overview(suite).exists() else []
    if len({row.dataset for row in rows}) > 1:
        for heading, table in overview_tables(rows):
            glance += [f"{heading.capitalize()}, in each dataset's own metric:", table]
        summary = summary_table(results, contenders)
        if summary is not None:
            glance += [SUMMARY, summary]
    if glance:
        sections.append(Section("At a glance", glance))
    for dataset, ran in _by_dataset(results).items():
        own = [result.row for result in ran]
        blocks: list[Block] = [note(own), results_table(own)]
        every_metric = metrics_table(own)
        if every_metric is not None:
            blocks += ["All metrics of the central test:", every_metric]
        to_target = target_table(own, reference)
        if to_target is not None:
            blocks += [f"To reach {own[0].metric} {own[0].target:g}:", to_target]
        equal = equal_score_table(ran, contenders)
        if equal is not None:
            blocks += ["What it took to be as good as a method's best evaluation, in parts of its own costs:", equal]
        curves = _curves(suite, dataset)
        sections.append(Section(dataset, [*blocks, *([curves] if curves.exists() else [])]))
    searched = search_table(rows)
    if searched is not None and suite.config.search is not None:
        sections.append(Section("Settings found", [_told_of_search(suite.config, suite.config.search), searched]))
    return sections


def _told_of_runs(suite: Suite, rows: Sequence[ResultRow]) -> str:
    seeds = ", ".join(map(str, suite.config.seeds))
    days = sorted({row.date for row in rows})
    span = f" (of {' to '.join(dict.fromkeys((days[0], days[-1])))})" if days else ""
    told = f"{len(rows)} of {len(suite.cells())} runs are finished{span}; seeds {seeds}."
    return f"{told} Written on {date.today().isoformat()}."


def _told_of_failures(suite: Suite) -> list[str]:
    """One line a run whose last attempt failed; the tables are of finished runs alone."""
    reasons = {cell.name: RunDirectory(suite.folder(cell)).read_failure() for cell in suite.cells()}
    return [f"Failed: {name}: {reason}" for name, reason in reasons.items() if reason is not None]


def _told_of_search(config: SuiteConfig, search: SearchConfig) -> str:
    told = (
        f"Every method had {search.trials} trials on each dataset, judged by their {search.by} on "
        f"{search.validation_fraction:.0%} of the training data; no trial saw the test split."
    )
    tuned = [f"{own.name} with {own.tuned_on}'s" for own in config.dataset if own.tuned_on is not None]
    return f"{told} Datasets without trials of their own: {', '.join(tuned)}." if tuned else told


def _curves(suite: Suite, dataset: str) -> Path:
    return suite.out / f"curves-{dataset}.png"


def _overview(suite: Suite) -> Path:
    return suite.out / "overview.png"


def _title(suite: Suite) -> str:
    return suite.config.title or "Comparison"


def _by_dataset(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.row.dataset, []).append(result)
    return found


def _markdown(title: str, sections: Sequence[Section]) -> str:
    parts = [f"# {title}"]
    for section in sections:
        if section.title:
            parts.append(f"## {section.title}")
        for block in section.blocks:
            if isinstance(block, Table):
                parts.append(block.as_markdown().rstrip())
            else:
                parts.append(f"![{block.stem}]({block.name})" if isinstance(block, Path) else block)
    return "\n\n".join(parts) + "\n"


def _html(title: str, sections: Sequence[Section]) -> str:
    parts = [f"<h1>{escape(title)}</h1>"]
    for section in sections:
        if section.title:
            parts.append(f"<h2>{escape(section.title)}</h2>")
        for block in section.blocks:
            if isinstance(block, Table):
                parts.append(block.as_html())
            elif isinstance(block, Path):
                data = b64encode(block.read_bytes()).decode()
                parts.append(f'<img alt="{escape(block.stem)}" src="data:image/png;base64,{data}">')
            else:
                parts.append(f"<p>{escape(block)}</p>")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
