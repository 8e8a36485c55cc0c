"""The local web page: watch a run, then walk through it. The server imports no torch.

server         the process: port, address, end         app           addresses and their answers
guard          which requests are allowed; the token   assets        the files of the page
routes/        the answers                             run_index     the served runs, by name
columns        losses and measurements in memory       table_rows    a page of the table of them
live           server-sent events, of changed files    about         what is known about a run, as JSON

worker_client  asks the worker                         worker        opens steps, in a process with torch
task_client    starts and stops tasks                  task_process  a task, in a process with torch
child_process  starting and ending them                share         a report with steps inside
regions        the numbers of a tensor                 sides         where two runs diverge

static/        the page itself: plain ES modules, a folder for each part
"""
