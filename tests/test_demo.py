"""What `make demo` says of what it measured."""

import pytest

from diffusionerf_ns.demo import images_judged


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [([1, 2, 3], [0, 4], "2 held-out images"), ([1, 2, 3], [1, 2, 3], "3 training images themselves")],
)
def test_the_heading_says_whether_images_were_held_out(train, test, said):
    split = {kind: [{"id": i, "name": str(i)} for i in ids] for kind, ids in (("train", train), ("test", test))}
    assert said in images_judged({"images": test, "split": split})
