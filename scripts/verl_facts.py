"""Check the text of the installed verl, beyond the signatures that the unit tests pin.

    pytest scripts/verl_facts.py

``scripts/check_verl_version.py`` runs this for another release.  The facts are in verl_facts.yaml; where one no longer
holds, read the change upstream and then what the message names on our side.
"""

import inspect
from pathlib import Path

import pytest
import verl
import yaml

from tests.unit.trainer.test_verl_contracts import BASE, SYNC, changed, locate

FACTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def text_of(place: str) -> str:
    """Return the source of an object, or of a file of verl, with single blanks."""
    if place.endswith(".py"):
        text = (Path(verl.__file__).parent / place).read_text(encoding="utf-8")
    else:
        text = inspect.getsource(locate(place))
    return " ".join(text.split())


@pytest.mark.parametrize(("place", "says"), [(place, says) for place, texts in FACTS.items() for says in texts])
def test_source_still_says_so(place: str, says: str) -> None:
    """The text is still there."""
    ours = FACTS[place][says]
    try:
        text = text_of(place)
    except (ImportError, AttributeError, OSError) as error:
        pytest.fail(changed(f"{place} is gone ({error})", ours))
    assert says in text, changed(f"{place} no longer says `{says}`", ours)


def test_the_synchronous_trainer_overrides_nothing_that_the_facts_were_read_in() -> None:
    """Methods of the base class are those that run."""
    base, sync = locate(BASE), locate(SYNC)
    read = {place.rpartition(".")[2] for place in FACTS if place.startswith(BASE)}
    assert not {name for name in read if getattr(sync, name) is not getattr(base, name)}
