"""What a person sees in a terminal: a bar for long work, lines otherwise, and the tables."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

Json = dict[str, Any]

# Without a terminal, one progress line in this many seconds.
QUIET_SECONDS = 30.0


class ConsoleReport:
    """A bar with tokens/s, loss and time left on a terminal; a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.title = ""
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,}/{task.total:,} {task.fields[unit]}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.row: TaskID | None = None
        self.last_line = time.monotonic()

    def __enter__(self) -> ConsoleReport:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        # Stopping a bar that never started prints an empty line.
        if self.console.is_terminal:
            self.bar.stop()

    def start(self, title: str) -> ConsoleReport:
        """The next piece of work begins; returns this report."""
        self.title = title
        if self.row is not None:
            self.bar.remove_task(self.row)
            self.row = None
        return self

    def log(self, message: str) -> None:
        """One line."""
        line = f"{self.title}: {message}" if self.title else message
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
        """Move the bar, or print a line when the last one is long ago."""
        text = figures_text(figures)
        if self.console.is_terminal:
            if self.row is None:
                self.row = self.bar.add_task(self.title, total=total, unit=unit, figures=text)
            self.bar.update(self.row, completed=done, total=total, unit=unit, figures=text)
        elif time.monotonic() - self.last_line >= QUIET_SECONDS:
            self.last_line = time.monotonic()
            self.log(f"{done:,}/{total:,} {unit} {text}".rstrip())


def figures_text(figures: dict[str, float]) -> str:
    """`loss 3.12, tokens_per_second 140`: three significant digits are enough to watch."""
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


def family_table(index: Json) -> Table:
    """Parent and children, one row each: what the README's quickstart table shows."""
    table = Table(title=f"family {index['family']}", title_justify="left")
    for column in FAMILY_COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in family_rows(index):
        table.add_row(*row)
    return table


FAMILY_COLUMNS = (
    "model",
    "parameters",
    "CE pruned",
    "CE distilled",
    "KL to parent",
    "top-1",
    "tokens/s",
    "tokens trained",
    "seconds",
    "state",
)


def family_rows(index: Json) -> list[list[str]]:
    """The family as text cells; cross-entropy (CE) and KL are held-out, in nats a token."""
    parent = index["parent"]
    rows = [
        [
            "parent",
            f"{parent['parameters']:,}",
            "",
            f"{parent['held_out_ce']:.3f}",
            "",
            "",
            f"{parent['tokens_per_second']:,.0f}",
            "",
            "",
            "",
        ]
    ]
    for stage in index["stages"]:
        rows.append(
            [
                stage["name"],
                f"{stage['parameters']:,}",
                f"{stage['pruned_held_out_ce']:.3f}",
                f"{stage['held_out_ce']:.3f}",
                f"{stage['kl_to_parent']:.3f}",
                f"{100 * stage['top1_agreement']:.1f} %",
                f"{stage['tokens_per_second']:,.0f}",
                f"{stage['tokens_trained']:,}",
                f"{stage['seconds']:,.0f}",
                "reused" if stage["reused"] else "made",
            ]
        )
    return rows


def extended_tables(index: Json) -> list[Table]:
    """The children whose context was extended, where there are any."""
    if not index.get("extended"):
        return []
    table = Table(title=f"long contexts of family {index['family']}", title_justify="left")
    for column in EXTENDED_COLUMNS:
        table.add_column(column, justify="left" if column in ("model", "RoPE") else "right")
    for row in extended_rows(index):
        table.add_row(*row)
    return [table]


EXTENDED_COLUMNS = (
    "model",
    "rows of",
    "RoPE",
    "CE parent",
    "CE before",
    "CE extended",
    "KL before",
    "KL to parent",
    "top-1",
    "tokens trained",
    "seconds",
    "state",
)


def extended_rows(index: Json) -> list[list[str]]:
    """Extended children as text cells; figures are of held-out long rows, `before`: with the RoPE settings
    alone."""
    return [
        [
            row["name"],
            f"{row['sequence_length']:,}",
            rope_text(row["rope_parameters"]),
            f"{row['parent_held_out_ce']:.3f}",
            f"{row['before_held_out_ce']:.3f}",
            f"{row['held_out_ce']:.3f}",
            f"{row['before_kl_to_parent']:.3f}",
            f"{row['kl_to_parent']:.3f}",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row['tokens_trained']:,}",
            f"{row['seconds']:,.0f}",
            "reused" if row["reused"] else "made",
        ]
        for row in index["extended"]
    ]


def rope_text(parameters: Json) -> str:
    """`yarn x 4, theta 10,000`; of full attention where layers differ."""
    own = parameters.get("full_attention", parameters)
    scaling = f"{own['rope_type']} x {own['factor']:g}, " if own.get("factor") else ""
    return f"{scaling}theta {own['rope_theta']:,.0f}"


def control_tables(index: Json) -> list[Table]:
    """The last child and its controls, where there are any."""
    if not index.get("controls"):
        return []
    child = index["controls"][0]["of"]
    table = Table(title=f"controls of stage {child}", title_justify="left")
    for column in CONTROL_COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in control_rows(index):
        table.add_row(*row)
    return [table]


CONTROL_COLUMNS = (
    "model",
    "seed",
    "parameters",
    "tokens trained",
    "CE distilled",
    "worse by",
    "KL to parent",
    "worse by",
    "top-1",
    "seconds",
)


def control_rows(index: Json) -> list[list[str]]:
    """The child and its controls as text cells; differences in nats a token, positive where the child is
    better."""
    controls = index["controls"]
    (child,) = [stage for stage in index["stages"] if stage["name"] == controls[0]["of"]]
    # What all runs share stands in every row.
    own = {"seed": controls[0]["seed"], "held_out_ce_difference": None, "kl_to_parent_difference": None}
    return [
        [
            row["name"],
            str(row["seed"]),
            f"{row['parameters']:,}",
            f"{row['tokens_trained']:,}",
            f"{row['held_out_ce']:.3f}",
            signed(row["held_out_ce_difference"]),
            f"{row['kl_to_parent']:.3f}",
            signed(row["kl_to_parent_difference"]),
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row['seconds']:,.0f}",
        ]
        for row in ({**child, **own}, *controls)
    ]


def signed(difference: float | None) -> str:
    """`+0.012`; nothing for no difference to state."""
    return "" if difference is None else f"{difference:+.3f}"


def ledger_table(index: Json) -> Table:
    """What a family cost, child by child with its nodes, and the totals it is compared with."""
    table = Table(title=f"ledger of family {index['family']}", title_justify="left")
    for column in LEDGER_COLUMNS:
        table.add_column(column, justify="left" if column == "node" else "right")
    ledger = index["ledger"]
    for entry in ledger["entries"]:
        table.add_row(*ledger_cells(entry))
        for node in entry["nodes"]:
            table.add_row(*ledger_cells({**node, "name": f"  {node['name']}"}))
        table.add_section()
    for sums in (ledger["family"], *([ledger["controls"]] if index["controls"] else [])):
        table.add_row(*ledger_cells(sums))
    for name, flops in (
        ("floor: one teacher pass and the students", ledger["floor_flops"]),
        ("separate: each child with an online teacher", ledger["separate_flops"]),
    ):
        table.add_row(name, "", tera(flops), *[""] * 4)
    if ledger["over_floor"]:
        table.caption = (
            f"The family took {ledger['over_floor']:.3f} x the FLOPs of its floor; "
            f"separate runs take {ledger['separate_over_family']:.3f} x the family's."
        )
    return table


LEDGER_COLUMNS = ("node", "tokens", "TFLOPs", "of students", "of teachers", "seconds", "MB")


def ledger_cells(record: Json) -> list[str]:
    """One line of the ledger as text; `?` where an old manifest does not tell."""
    teacher = record["teacher_flops"]
    return [
        record["name"],
        f"{record['tokens']:,}",
        tera(record["flops"]),
        tera(None if teacher is None else record["flops"] - teacher),
        tera(teacher),
        f"{record['seconds']:,.1f}",
        f"{record['bytes'] / 1e6:,.1f}",
    ]


def tera(flops: int | None) -> str:
    """In 10^12, small ones with three significant digits."""
    if flops is None:
        return "?"
    return f"{flops / 1e12:,.1f}" if flops >= 1e14 else f"{flops / 1e12:.3g}"


def pilot_tables(pilot: Json) -> list[Table]:
    """What the policies of a pilot differ in, and what came out stage by stage."""
    title = f"pilot: {pilot['tokens']:,} tokens a stage, seed {pilot['seed']}"
    settings = Table(title=title, title_justify="left")
    results = Table(title="held-out figures", title_justify="left")
    families = [policy["family"] for policy in pilot["policies"]]
    for column in ("key", *families):
        settings.add_column(column)
    for name in pilot["policies"][0]["differs"]:
        settings.add_row(name, *(str(policy["differs"][name]) for policy in pilot["policies"]))
    for column in PILOT_COLUMNS:
        results.add_column(column, justify="left" if column in ("stage", "policy") else "right")
    for row in pilot_rows(pilot):
        results.add_row(*row)
    return [settings, results]


PILOT_COLUMNS = ("stage", "policy", "CE distilled", "KL to parent", "top-1", "seconds")


def pilot_rows(pilot: Json) -> list[list[str]]:
    """Stage by stage, the policies in the order of their recipes."""
    policies = pilot["policies"]
    return [
        [
            policy["stages"][place]["name"],
            policy["family"],
            f"{policy['stages'][place]['held_out_ce']:.3f}",
            f"{policy['stages'][place]['kl_to_parent']:.3f}",
            f"{100 * policy['stages'][place]['top1_agreement']:.1f} %",
            f"{policy['stages'][place]['seconds']:,.0f}",
        ]
        for place in range(len(policies[0]["stages"]))
        for policy in policies
    ]


def race_tables(index: Json) -> list[Table]:
    """For every stage that raced: its candidates, best first, with their curves."""
    return [race_table(stage) for stage in index["stages"] if stage.get("race")]


def race_table(stage: Json) -> Table:
    """One row a candidate: shape, parameters, cross-entropy in nats after each leg that it ran."""
    table = Table(title=f"race of stage {stage['name']}", title_justify="left")
    for column in race_columns(stage):
        table.add_column(column, justify="left" if column in ("shape", "outcome") else "right")
    for row in race_rows(stage):
        table.add_row(*row)
    return table


def race_columns(stage: Json) -> list[str]:
    """One column for each leg of the race."""
    ends = max((candidate["curve"] for candidate in stage["race"]), key=len)
    return ["shape", "parameters", *(f"CE at {end['tokens']:,} tokens" for end in ends), "outcome"]


def race_rows(stage: Json) -> list[list[str]]:
    """The candidates as text cells, those that ran longest first."""
    legs = max(len(candidate["curve"]) for candidate in stage["race"])
    ordered = sorted(
        stage["race"], key=lambda one: (-len(one["curve"]), [end["ce"] for end in one["curve"][-1:]])
    )
    return [
        [
            shape_text(one["architecture"]),
            f"{one['parameters']:,}",
            *(f"{end['ce']:.3f}" for end in one["curve"]),
            *[""] * (legs - len(one["curve"])),
            race_outcome(one),
        ]
        for one in ordered
    ]


def race_outcome(candidate: Json) -> str:
    """How far a candidate came."""
    if candidate["won"]:
        return "won"
    return f"out after {candidate['curve'][-1]['tokens']:,} tokens" if candidate["curve"] else "failed"


def shape_text(sizes: Json) -> str:
    """`28 layers, hidden 576, FFN 1024, 9 heads in 3 groups`."""
    experts = f"{sizes['experts']} x " if sizes["experts"] else ""
    heads = sizes["kv_groups"] * sizes["heads_per_group"]
    return (
        f"{sizes['layers']} layers, hidden {sizes['hidden']}, FFN {experts}{sizes['ffn']}, "
        f"{heads} heads in {sizes['kv_groups']} groups"
    )


def record_table(title: str, record: Json) -> Table:
    """Nested JSON as a two-column table with dotted names."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in flatten(record):
        table.add_row(name, value)
    return table


def flatten(record: Json, prefix: str = "") -> list[tuple[str, str]]:
    """`{"a": {"b": 1}}` -> `[("a.b", "1")]`; lists stay on one line."""
    rows: list[tuple[str, str]] = []
    for name, value in record.items():
        if isinstance(value, dict):
            rows += flatten(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, str(value)))
    return rows
