from tests.atlas_fixture import atlas as atlas
from tests.atlas_fixture import atlas_folder as atlas_folder
