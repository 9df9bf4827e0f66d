from mxdist.observe.module_names import compact_names


def test_numbers_of_one_pattern_are_folded_into_ranges() -> None:
    names = [f"layers.{layer}.experts.{expert}.up" for layer in (0, 1) for expert in range(4)]
    assert compact_names(names) == "layers.{0-1}.experts.{0-3}.up"


def test_a_gap_is_shown_and_a_single_number_stands_bare() -> None:
    assert compact_names(["layers.0.q", "layers.2.q", "layers.3.q"]) == "layers.{0,2-3}.q"
    assert compact_names(["layers.5.q"]) == "layers.5.q"


def test_an_incomplete_product_is_not_shown_as_complete() -> None:
    assert compact_names(["l.0.e.0", "l.1.e.1"]) == "l.{0-1}.e.{0-1} (2 of them)"


def test_names_that_differ_in_the_last_part_share_a_line() -> None:
    names = [f"l.{layer}.{last}" for layer in (0, 1) for last in ("k", "q")]
    assert compact_names(names) == "l.{0-1}.{k,q}"


def test_no_names_read_none() -> None:
    assert compact_names([]) == "none"
