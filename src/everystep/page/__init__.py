"""The local web page: watch a run, then walk through it. The server imports no torch.

server         the process: port, address, end       app           which address is answered by what
guard          who may ask, what browsers may do     secret        the token that opens the page
routes/        the answers                           assets        the files that the page consists of
run_index      the runs that are served, by name     about         what is known about a run, as JSON
columns        losses, measurements in memory        table_rows    a page of the table of them
live           server-sent events                    watches       what the file system tells

worker_client  asks the worker                       worker        opens steps, in a process with torch
task_client    starts and stops tasks                task_process  a task, in a process with torch
child_process  how these are started and ended       share         a report with steps inside
regions        the numbers of a tensor               sides         where two runs part

static/        the page itself: plain ES modules, a folder for each part
"""
