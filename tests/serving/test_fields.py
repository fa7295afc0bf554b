"""Form fields as options."""

from whisper_nnx.serving.fields import OPTION_FIELDS, Fields


def options(*items: tuple[str, str]) -> dict:
    return Fields(items).take_options(OPTION_FIELDS)


def test_repeated_fields_are_a_list_where_the_option_is_one():
    assert options(("choices[]", "Yes, please."), ("choices[]", "No."))["choices"] == ("Yes, please.", "No.")
    assert options(("choices", "Yes.,No."))["choices"] == ("Yes.", "No.")
    assert options(("choices", "Yes, please.\nNo."))["choices"] == ("Yes, please.", "No.")
    assert [one.text for one in options(("bias[]", "Grimm, Jakob"), ("bias[]", "Kubernetes"))["bias"]] == [
        "Grimm, Jakob",
        "Kubernetes",
    ]
    assert options(("suppress_tokens[]", "-1"), ("suppress_tokens[]", "50"))["suppress_tokens"] == "-1,50"
    assert options(("allowed_languages[]", "de"), ("allowed_languages[]", "French"))["allowed_languages"] == [
        "de",
        "fr",
    ]


def test_of_other_repeated_fields_the_last_one_counts():
    assert options(("beam_size", "2"), ("beam_size", "3"))["beam_size"] == 3
