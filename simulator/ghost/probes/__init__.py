"""What feeds the ghost from the product as it is: methods of its classes, wrapped while somebody watches.

The product knows nothing of it.  A seam is a method by which something comes about that the ghost must hear
of: a store of an entry, a fill of a cache, a page that is given up.  It is told before what gives away and
after what is made, in the step itself, so that a judge looks at what is true right then.  `watching` is what
one calls; tests/integration/simulator/test_ghost_probes.py holds that each seam is there and none passed by.

Wrap before anything is made: an object that has taken a bound method with it keeps the one it took.
Not fed: pages that iommufdd pins by their place in a file (windows onto them count as not watched).
"""
