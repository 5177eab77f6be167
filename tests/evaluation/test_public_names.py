"""What the package of metrics exports, whatever of it has been imported before."""

import importlib
import inspect
import pkgutil

import pytest

from imagenet64_diffusion import evaluation
from imagenet64_diffusion.evaluation import options, protocols


def test_public_names_are_functions_and_classes_whatever_has_been_imported():
    modules = [module.name for module in pkgutil.iter_modules(evaluation.__path__)]
    for module in modules:
        # this is where a module would take the place of what has its name
        importlib.import_module(f"{evaluation.__name__}.{module}")
    assert not set(modules) & set(evaluation.__all__)
    assert dir(evaluation) == sorted(evaluation.__all__)
    for name in evaluation.__all__:
        found = getattr(evaluation, name)
        assert inspect.isclass(found) or inspect.isfunction(found), name
        assert found.__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        evaluation.nothing  # noqa: B018
    assert tuple(protocols.PROTOCOLS) == options.PROTOCOLS
