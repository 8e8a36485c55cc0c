"""The local web page: watch a run, then walk through it. The server imports no torch.

server    the process: port, address, end          app      addresses and their answers
guard     which requests are allowed               secret   the token that opens the page
routes/   the answers                              assets   the files of the page
shelf     the served runs, by name
columns   losses and measurements in memory        rows     a page of the table of them
live      server-sent events                       watches  changes in the file system
about     what is known about a run, as JSON

desk      asks the worker                          worker   opens steps, in a process with torch
regions   the numbers of a tensor                  share    a report with steps inside
tasks     starts and stops tasks                   task     a task, in a process with torch
sides     where two runs diverge                   processes  starting and ending them

static/   the page itself: plain ES modules, a folder for each part
"""
