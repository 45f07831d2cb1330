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


NESTED = """Parser key "data.train":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'siglip2.core.data.settings.TrainSet'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'siglip2.core.data.settings.TrainSet':
        Parser key "sources":
          Does not validate against any of the Union subtypes
          Subtypes: [dict[str, siglip2.core.data.settings.SourceSet], <class 'NoneType'>]
          Errors:
            - Problem with given class_path 'siglip2.core.data.settings.SourceSet':
                Option 'wieght' is not accepted
            - Expected a <class 'NoneType'>
          Given value type: <class 'dict'>
          Given value: {'a': {'path': 'x', 'wieght': 1}}
    - Expected a <class 'NoneType'>
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='sources', val={'a': {'path': 'x', 'wieght': 1}})"""


def test_of_one_error_inside_another_the_place_and_the_reason_are_left():
    assert essence(NESTED) == "Parser key \"data.train.sources\": Option 'wieght' is not accepted"
