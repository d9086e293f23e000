"""The fork server's last import: else each rank's collector would touch, and so copy, every page of the others."""

import gc

gc.collect()
gc.freeze()
