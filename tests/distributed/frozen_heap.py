"""The fork server's last import: freezes the heap, or the garbage collector of each forked rank would write to, and so
copy, every page that it shares with the server."""

import gc

gc.collect()
gc.freeze()
