"""The gymnasium environment under the name that users import; importing it registers `autoprune/AMC-v0`."""

from autoprune.integrations.gymnasium_env import ID as ID
from autoprune.integrations.gymnasium_env import AmcEnv as AmcEnv
from autoprune.integrations.gymnasium_env import make_env as make_env
