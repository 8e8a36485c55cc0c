"""The local web page: watch a run, then walk through it. The server imports no torch.

server    the process: port, address, end          app      which address is answered by what
guard     who may ask, and what browsers may do    secret   the token that opens the page
routes/   the answers                              assets   the files that the page consists of
shelf     the runs that are served, by name
columns   losses and measurements in memory        rows     a page of the table of them
live      server-sent events                       watches  what the file system tells
about     what is known about a run, as JSON

desk      asks the worker                          worker   opens steps, in a process with torch
regions   the numbers of a tensor                  share    a report with steps inside
tasks     starts and stops tasks                   task     a task, in a process with torch
sides     where two runs part                      processes  how these are started and ended

static/   the page itself: plain ES modules, a folder for each part
"""
