"""Names that several programs must share: what a site may be called, a run's status, what labels mean."""

from typing import Literal

SITE_NAME = r"^[a-z0-9][a-z0-9-]{0,40}$"
STATUS = "status.json"
# multiclass: one class a record; multilabel: K findings, each present, absent or unknown; ordinal: one grade a record
Task = Literal["multiclass", "multilabel", "ordinal"]
TASKS: tuple[Task, ...] = ("multiclass", "multilabel", "ordinal")
# a server may name findings that a site does not label, and each takes memory for each of the site's records
MOST_FINDINGS = 512
WORD = {"multiclass": "class", "multilabel": "finding", "ordinal": "grade"}  # what a label of a task is
WORDS = {"multiclass": "classes", "multilabel": "findings", "ordinal": "grades"}
