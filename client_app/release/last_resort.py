"""What a site answers where its own step fails: as if it had no record. The only such place.

Whether a site answers, and how, must not depend on its records. From the moment they are read a step can't fail for a
reason that lies in them: a record, or a unit, that can't be used adds nothing, each by itself. Should it fail all the
same, the whole step is done again with no record at all: the same code adds the same noise to a sum of zero, and what
leaves is the same in kind, names, shapes and size. The round is charged; the fault is in the site's own log alone.

This carries no guarantee by itself: a server that could bring it about for one set of records and not for another would
read that difference, as far as the noise lets it. So tests see that no record, unit or parameter within the public
bounds brings it about.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from client_app.place import Place
from client_app.records import no_data, training_data
from client_app.site_log import write_log
from client_app.task import Work
from common.records import SiteData

Released = TypeVar("Released")
LOGGED = "a step failed on the site's records, and noise alone was sent in its place: report it"


def from_records(place: Place, work: Work, step: Callable[[SiteData], Released]) -> Released:
    """A step on the site's training records; on none, where that fails.

    Args:
        place: the site.
        work: the task.
        step: training records -> what is kept and sent, already noised and packed. Whatever it does outside what it
            returns must be the same for all records.

    Raises:
        KeyboardInterrupt, SystemExit: the process itself ends.
        Exception: the step fails without records too: for a public reason, the same at every site.
    """
    try:
        return step(training_data(place.records, place.cache_dir, work.context))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # memory that ran out, and panics of libraries in Rust, which are no Exception
        with suppress(Exception):
            where = f"run {work.run_id}, round {work.round_index + 1}"
            write_log(place.folder, f"{LOGGED} ({where})\n{traceback.format_exc()}")
    return step(no_data(work.context, work.index))
