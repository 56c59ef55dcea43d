from acmix_deploy.families.family import Family
from acmix_deploy.graph import NoMatch, Reached
from acmix_deploy.operators.spec import TOLERANCES


def match(graph, node):
    raise NoMatch("x", Reached.NOTHING)


LOCAL_ATTENTION = Family("local_attention", (), match, match, TOLERANCES)
