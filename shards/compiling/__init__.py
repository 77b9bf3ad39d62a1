"""Programs tried and compiled where they can do no harm.

A stored program is read, checked, compiled and run for the first time in a child of the device
actor: parsing a damaged one can end a process, compiling or running a hostile one can take all
memory or never end. What the actor gets are executables, which it loads without lowering anything.

    messages    what the two say to each other, and how it is sealed
    channel     sealed frames over a socket
    trial       what the child does with a unit
    child       the child's process
    process     the child, as its parent sees it: started, asked, given up, ended
    handover    executables between the two
    cache       executables on disk, sealed with the cluster's secret
    compiler    all of it put together, for the thread that loads
"""
