import sys,json
from pathlib import Path
from scripts.quality.validate import *
from scripts.quality.choices import ALL_LAYERS
from mediator_cli.evaluate.score import score_rows, ScoreSettings
from mediator_cli.evaluate.models import *
from mediator_cli.recipe.load import load_recipe
from mediator_cli.plan.make import make_plan
from mediator_cli.pipeline.merge import merge, Settings
from dataclasses import replace
import shutil
tasks=version(DATA,"valid",100)
def bundle(name,ch):
    f=WORK/"probe2"/name
    if not f.is_dir():
        f.parent.mkdir(parents=True,exist_ok=True)
        plan=make_plan(load_recipe(RECIPE,ch)); plan=replace(plan,experts=tuple(replace(e,prompts=None) for e in plan.experts),router=None)
        merge(plan,f,None if "assign.rule=none" in ch else CHECKOUT/"demo/conflicts.json",Settings())
    return f
def run(name,ch,ws):
    f=bundle(name,ch); m,tok=load_candidate(Candidate("",f,"bundle"))
    size=sum(p.stat().st_size for p in f.rglob("*.safetensors"))/269e6
    for w in ws:
        acc={t.name:100*sum(s.exact for s in score_rows(m,tok,t.rows,ScoreSettings(mixture={t.name:w})))/len(t.rows) for t in tasks}
        print(name,"w",w,{k:round(v,1) for k,v in acc.items()},"mean",round(sum(acc.values())/4,1),"size",round(size,3),flush=True)
    shutil.rmtree(f)
if __name__=="__main__":
    for spec in sys.argv[1:]:
        dense,layers,vals,dens,ws=spec.split("/")
        ch={"base":("extract.dense=base",),"lin":("average.method=linear",),"ta4":("average.method=task_arithmetic","average.lambda=0.4"),"ties":("average.method=ties","average.density=0.2","average.lambda=0.7")}[dense]
        ly={"all":("assign.rule=all",),"layers":ALL_LAYERS,"half":("assign.rule=mean_std",)}[layers]
        run(f"{dense}-{layers}-{vals}-{dens}",(*ly,*ch,f"extract.density={dens}",f"extract.values={vals}"),[float(x) for x in ws.split(",")])
