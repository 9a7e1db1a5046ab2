"""Settings of the whole suite."""

from hypothesis import settings

# Machines that run tests are shared: what matters is the result, not how long one example took.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
