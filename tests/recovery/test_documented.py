"""The table of docs/production.md has every option with its default, and the job that it shows is one."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields

import yaml

from autoprune.application.recovering import FULL_EPOCHS
from autoprune.files.job import Job
from autoprune.recovery import SHARED, Distilled, build_recovery
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
SECTION = TEXT.split("## Training back")[1].split("\n## ")[0]
WORDS = {"none": None, "found": None, "by the model": None, "its own": None, "a tenth": None, "by the clock": None}


def test_every_option_is_in_the_table_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", SECTION.split("| option |")[1], re.MULTILINE)
    told = {name: value.strip().strip("`") for name, value in rows}
    assert set(told) == SHARED
    made = Distilled()
    for field in fields(Distilled):
        if field.name not in SHARED:
            continue
        default = getattr(made, field.name) if field.default is MISSING else field.default
        shown = WORDS.get(told[field.name], told[field.name])
        if field.name == "epochs":
            assert float(told["epochs"]) == FULL_EPOCHS
        elif shown is None:
            assert not default, field.name
        else:
            assert yaml.safe_load(shown) == default, field.name


def test_the_job_that_it_shows_is_one() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", SECTION, re.DOTALL)
    job = Job.from_dict({"task": {"name": "digits"}, **yaml.safe_load(text)})
    course = build_recovery(job.recovery.schedule, job.options("recovery")).course
    assert course is not None
    assert (course.epochs, course.optimizer, course.ema, course.patience) == (30, "adamw", 0.999, 4)
