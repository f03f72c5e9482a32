"""A toy of an Open-Sora 2.0 checkout: what its script calls by these names, in a few lines, with the models of
open_sora_toys."""


class Config(dict):
    """As mmengine's: keys are attributes too."""

    filename = "configs/256px.py"

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        self[name] = value
