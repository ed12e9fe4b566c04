"""The embedded world: pictures anyone may use (``world``) and the weights trained on them (``weights/``)."""
