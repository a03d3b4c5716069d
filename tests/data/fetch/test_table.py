"""The table of sources: sound, complete, and honest about what is not known."""

from urllib.parse import urlsplit

import pytest

from lapilli.base.errors import DataError
from lapilli.base.progress import size_text
from lapilli.data.fetch.table import Item, load_table, size_bytes

SMALL = """
items:
  a: {save: a.json, url: "https://example.com/a.json", licence: none, licence_page: "https://example.com"}
mixtures:
  one: {title: One, folder: one, items: [a]}
"""


def test_every_mixture_of_the_documents_is_there():
    table = load_table()
    assert set(table.mixtures) == {
        "llava-pretrain-558k",
        "cc3m-595k",
        "llava-instruct-80k",
        "llava-instruct-150k",
        "llava-instruct-158k",
        "llava-mix665k",
        "kollava-cc3m-595k",
        "kollava-instruct-150k",
        "kollava-instruct-158k",
        "kollava-mix581k",
        "kollava-instruct-612k",
        "quilt-pretrain-723k",
        "quilt-instruct-107k",
        "quilt-1m",
    }
    used = {item for mixture in table.mixtures.values() for item in mixture.items}
    assert used == set(table.items)


def test_the_trees_are_those_that_the_documents_draw():
    table = load_table()
    unpacked = {item.unpack.into for name in table.mixture("llava-mix665k").items if (item := table.items[name]).unpack}
    assert unpacked == {"coco", "gqa", "textvqa", "vg"}
    assert table.items["ocr-vqa-images"].save == "ocr_vqa/images"
    quilt = table.mixture("quilt-pretrain-723k")
    assert table.items["quilt-images"].unpack.into == "Quilt-LLaVA-Pretrain/quilt_1m"
    assert quilt.folder == "playground/data"
    assert table.mixture("llava-pretrain-558k").folder == "pretraining_data"


def test_what_only_a_person_can_get_says_how_and_everything_shows_its_licence():
    table = load_table()
    for name, item in table.items.items():
        assert item.licence, name
        assert urlsplit(item.licence_page).scheme == "https", name
        assert not item.by_hand or (item.request and item.page), name
    asks = {name for name, mixture in table.mixtures.items() if any(table.items[i].request for i in mixture.items)}
    assert asks == {
        "llava-mix665k", "kollava-mix581k", "kollava-instruct-612k",
        "quilt-pretrain-723k", "quilt-instruct-107k", "quilt-1m",
    }  # fmt: skip
    korean = table.items["ko-ekvqa-images"]
    assert korean.checked_with == "no checksum is published; what is checked: nothing, it is taken as it is"
    assert table.items["ko-mix612k-json"].size is None


def test_every_address_is_https_and_every_checksum_has_its_publisher():
    for name, item in load_table().items.items():
        if item.url:
            assert urlsplit(item.url).scheme == "https", name
        assert bool(item.md5 or item.sha256) == bool(item.hash_from), name
        assert "no checksum is published" in item.checked_with or item.hash_from or "hub states" in item.checked_with


def test_two_items_never_share_a_place():
    places = [item.save for item in load_table().items.values()]
    assert len(places) == len(set(places))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("save: a.json", "save: ../a.json"), "must be a relative path that stays"),
        (("save: a.json", "save: /a.json"), "must be a relative path that stays"),
        (("save: a.json", "saved: a.json"), "items.a.save: Field required"),
        (("items: [a]", "items: [b]"), "mixture one names items that are not there: b"),
        (('url: "https://example.com/a.json"', "page: x"), "needs a `url`"),
        (("save: a.json", f"save: a.json, md5: {'a' * 32}"), "a checksum needs `hash_from`"),
        (("save: a.json", "save: a.json, md5: abc, hash_from: x"), "items.a.md5"),
        (("save: a.json", "save: a.json, about: 3 GiB"), "must be a size such as"),
        (("title: One", "title: One, title: Two"), "is given twice"),
        (("items:\n", "items: [\n"), "not valid YAML"),
    ],
)
def test_a_table_of_ones_own_is_checked(tmp_path, change, message):
    path = tmp_path / "own.yaml"
    path.write_text(SMALL, "utf-8")
    assert load_table(path).mixture("one").items == ("a",)
    path.write_text(SMALL.replace(*change), "utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load_table(path)
    assert "own.yaml" in str(caught.value)


def test_a_table_or_a_mixture_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="can't read the table"):
        load_table(tmp_path / "none.yaml")
    with pytest.raises(DataError, match='did you mean "llava-mix665k"'):
        load_table().mixture("llava-mix656k")


def test_sizes_in_words():
    assert [size_bytes(text) for text in ("27.4 GB", "181 MB", "5 B")] == [27_400_000_000, 181_000_000, 5]
    for size in (0, 5, 999, 1000, 20_500_000, 27_400_000_000, 3_000_000_000_000):
        assert abs(size_bytes(size_text(size)) - size) <= size * 0.005
    assert size_text(999_999_999) == "1 GB"
    for wrong in (5, "5", "5 GiB", "-5 GB", None):
        with pytest.raises(ValueError, match="must be a size"):
            size_bytes(wrong)


def test_what_is_checked_is_said():
    common = {"save": "a", "licence": "x", "licence_page": "y"}
    plain = Item(url="https://example.com/a", **common)
    assert plain.checked_with.startswith("no checksum is published")
    assert "hub states" in Item(url="https://huggingface.co/datasets/a/b/resolve/main/c", **common).checked_with
    known = Item(url="https://example.com/a", md5="0" * 32, hash_from="its maker", **common)
    assert known.checked_with == "MD5 in the table (from: its maker)"
