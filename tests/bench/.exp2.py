import sys,os,time,subprocess,shutil
sys.path.insert(0,"/work/main/tests")
import ssh_transfer as s
opts=sys.argv[1].split(","); size=int(sys.argv[2]); streams=sys.argv[3].split(","); kind=sys.argv[4]
w=s.Wan(opts); b=s.Bench(w.lab,1)
try:
    d=b.data(kind,size<<20)
    for k in streams:
        b.number+=1
        t=b.ours("put",d,b.number,k); back=__import__("tempfile").mkdtemp(dir=w.lab.dir); g=b.ours("get",back,b.number,k)
        print("streams",k,"put %.2f get %.2f load %.1f"%(t,g,os.getloadavg()[0]),flush=True)
finally: w.close()
