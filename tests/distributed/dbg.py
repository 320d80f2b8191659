import os, ctypes, time
import torch, torch.distributed as dist
from tests.distributed.scripts import build
from tests.distributed.failing import batches, rank, Plan, misfortune
def own_group(when):
    dist.init_process_group('gloo')
    pipe=build(); pipe.train(batches(5))
    if when=='before': dist.destroy_process_group()
    pipe.close()
    if when=='after': dist.destroy_process_group()
    return 1
def again():
    n=os.environ['TORCHELASTIC_RESTART_COUNT']
    if n=='0': misfortune(Plan('raise',1,'forward',50))
    pipe=build(); pipe.train(batches(5)); pipe.close(); print('second attempt fine',flush=True)
def no_stderr():
    if rank()==1: os.close(2)
    misfortune(Plan('raise',1,'forward',50))
def gil(timeout):
    pipe=build(timeout=timeout); pipe.train(batches(5)); 
    if rank()==1: ctypes.PyDLL(None).sleep(4)
    pipe.train(batches(5)); pipe.close()
