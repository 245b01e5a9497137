"""Placeholder."""
def settle(doms, dom, timeout):
    raise NotImplementedError
