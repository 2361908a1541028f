"""Class names of a config or a file beside the data, against classes as the data has them."""

import numpy as np
import pytest
from etils import epath
from tiny_sets import digits

from clip_jax.errors import UserError
from clip_jax.evaluate.sets import classes, descriptions, finding

WORDS = [f"word{i}" for i in range(12)]


@pytest.mark.parametrize(
    ("names", "by_name", "given", "wanted"),
    [
        ((), False, ["b", "a"], [0, 1]),  # numbers alone: theirs
        (("a", "b"), True, ["b", "a"], [1, 0]),
        (("a", "b"), False, ["b", "a"], [1, 0]),
        (("great_dane", "cat"), True, ["Cat", "dog|Great Dane", "cow"], [1, 0]),
        (("0", "2", "10"), True, WORDS, [0, 2, 10]),
        (("00", "01"), True, ["no", "yes"], [0, 1]),
        (("n01", "n02"), False, ["tench", "goldfish"], [0, 1]),  # the data's own numbers
        (("plane", "bird"), False, ["airplane", "bird"], [0, 1]),
    ],
)
def test_names_are_matched(names, by_name: bool, given, wanted):
    assert classes.match_given(given, names, by_name, "the data").tolist() == wanted


@pytest.mark.parametrize(
    ("names", "by_name", "given", "message"),
    [
        (("n01", "n02"), True, ["tench", "goldfish"], "is the class 'n01' of the data"),
        (("plane", "bird"), True, ["airplane", "bird"], "'plane'"),
        (("plane", "bird"), False, ["bird", "airplane"], "'plane'"),
        (("a", "b", "c"), False, ["x", "y"], "'a'"),
        (("1", "2"), True, ["one", "two"], "class 2 in the data, but 2 class names"),
    ],
)
def test_names_that_cannot_be_matched_are_refused(names, by_name: bool, given, message: str):
    with pytest.raises(UserError, match=message):
        classes.match_given(given, names, by_name, "the data")


@pytest.mark.parametrize("listed", [True, False])
def test_numeric_folders_are_numbered_by_their_names(tmp_path, listed: bool):
    for i, (image, _) in enumerate(digits(12)):
        (tmp_path / "v2" / str(i)).mkdir(parents=True)
        image.save(tmp_path / "v2" / str(i) / "a.png")
    if listed:
        (tmp_path / "v2" / "classnames.txt").write_text("\n".join(WORDS))
    dataset = descriptions.read_path(epath.Path(tmp_path / "v2"), lambda name: None)
    assert dataset.class_names == (tuple(WORDS) if listed else tuple(map(str, range(12))))
    assert dataset.prompts["own"] == ("a photo of a {}.",)
    source = finding.open_split(dataset, "test", "", image_size=8)
    found = {source[i].key: source[i].label for i in range(12)}
    assert found == {f"{i}/a.png": i for i in range(12)}
    assert np.unique(list(found.values())).size == 12
