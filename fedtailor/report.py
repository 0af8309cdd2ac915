"""interim"""
from fedtailor import store
from fedtailor.result import model_bytes
def write_run(folder,*,result,plan,params,config_yaml):
    folder.mkdir(parents=True,exist_ok=True)
    store.write_text(folder/"result.json", result.model_dump_json(by_alias=True,indent=1))
    store.write_bytes(folder/"model.safetensors", model_bytes(params))
def console_table(r): return r.model_dump_json(indent=1)
