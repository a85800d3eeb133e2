"""Imported by verl under ``VERL_USE_EXTERNAL_MODULES=rewardfuse.integrations.verl.plugin``, this installs our KL there.

verl imports the modules which that variable names at the end of its own import, so in the driver and in every worker
that has the variable in its environment.
"""

from rewardfuse.integrations.verl import install

install()
