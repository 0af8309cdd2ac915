"""interim"""
import csv
from pathlib import Path
class S:
    def __init__(s,t): s.t=t
    def table(s): return s.t
def heart_disease():
    rows=list(csv.DictReader(open("/work/shared/data/heart_disease_uci/heart_disease_4sites.csv")))
    out={}
    for name in ("cleveland","hungary","switzerland","va"):
        r=[x for x in rows if x["site"].startswith(name[:4])]
        out[name]=S({k:[x[k] for x in r] for k in r[0] if k!="site"})
    return out
def write_csv(t,p):
    with open(p,"w",newline="") as f:
        w=csv.writer(f); w.writerow(t); w.writerows(zip(*t.values()))
