"""Errors of the parser keep what a user can act on."""

from siglip2.cli.messages import essence

UNION = """Does not validate against any of the Union subtypes
Subtypes: [<class 'siglip2.plugins.naflex.NaFlex'>, <class 'NoneType'>]
Errors:
  - naflex: expected sequence lengths that differ, found seq_lens=[4, 4]
  - Expected a <class 'NoneType'>
Given value type: <class 'jsonargparse._namespace.Namespace'>
Given value: Namespace(seq_lens=[4, 4], batch_size=32768)"""


def test_reason_is_left_of_an_error_about_several_types():
    assert essence(UNION) == "naflex: expected sequence lengths that differ, found seq_lens=[4, 4]"


def test_what_stands_before_it_names_the_option():
    assert essence('Parser key "plugins.naflex": ' + UNION).startswith('Parser key "plugins.naflex": naflex: expected')


def test_other_messages_stay_as_they_are():
    assert essence("no recipe 'x'\nGive a path") == "no recipe 'x'\nGive a path"
